"""Speed beside other loops and loaders, and what safety costs. Never imported by the packages."""
