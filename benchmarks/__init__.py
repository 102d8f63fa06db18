"""Speed beside named peers, and what safety costs. Never imported by the packages."""
