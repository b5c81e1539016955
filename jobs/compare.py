"""A comparison as a Ray job.

ray job submit --working-dir . -- python jobs/compare.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
