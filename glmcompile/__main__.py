"""`python -m glmcompile`: the command line."""

from glmcompile.cli import main

main()
