"""Speed beside named peers and the machine's limit. Never imported by the packages."""
