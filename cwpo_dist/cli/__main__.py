"""`python -m cwpo_dist.cli` is `cwpo`."""

from cwpo_dist.cli.app import main

if __name__ == "__main__":
    main()
