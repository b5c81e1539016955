"""`python -m cwpo_dist.cli` is `cwpo`."""

from cwpo_dist.cli.app import main

main()
