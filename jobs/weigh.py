"""The stage `weigh`, and what it needs, as a Ray job.

ray job submit --working-dir . -- python jobs/weigh.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["weigh", *sys.argv[1:]])
