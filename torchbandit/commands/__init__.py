"""The commands of the command line, each in a small file: its options, and the call.

command.py    what a command is
train.py      score.py  profile.py  bench.py  pull.py
fields.py     the options that the fields of a dataclass are
layout.py     a command's options under headings, with those of the chosen algorithm
parser.py     the parser and its help
config.py     YAML in and out
read.py       from arguments and a config file to the command's dataclass

Nothing heavy is imported before a command's options are read: help and typing errors are instant.
"""
