"""Builds the command-line parsers of the benchmarks."""

import argparse


def argument_parser(doc: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Returns a parser whose --help prints `doc` with its line breaks. Flags must be written in full."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, epilog=epilog, allow_abbrev=False)
