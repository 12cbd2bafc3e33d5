"""Files that other tools run, made of artifacts: see ``convert``."""
