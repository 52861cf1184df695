"""`python -m vlmport`."""

from vlmport.cli import main

main()
