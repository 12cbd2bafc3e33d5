"""Models from where they lie: folders, files, modules, the zoo."""
