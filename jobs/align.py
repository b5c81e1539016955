"""The stage `align`, and what it needs, as a Ray job.

ray job submit --working-dir . -- python jobs/align.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["align", *sys.argv[1:]])
