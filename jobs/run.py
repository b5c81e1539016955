"""A whole run as a Ray job.

ray job submit --working-dir . -- python jobs/run.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
