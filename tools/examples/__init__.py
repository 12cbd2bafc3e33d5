"""Six things to do, each in one short file: ``python -m graphwright.tools.examples.NAME [OUT]``."""
