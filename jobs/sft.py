"""The stage `sft`, and what it needs, as a Ray job.

ray job submit --working-dir . -- python jobs/sft.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["sft", *sys.argv[1:]])
