"""The stage `fit`, and what it needs, as a Ray job.

ray job submit --working-dir . -- python jobs/fit.py CONFIG.yaml [OVERRIDES]
"""

import sys

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main(["fit", *sys.argv[1:]])
