"""`cwpo check`: whether the program is right on these machines, and how fast, in minutes."""
