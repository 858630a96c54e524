"""The verbs of the command line, a file each, and how its words, YAMLs and errors are read."""
