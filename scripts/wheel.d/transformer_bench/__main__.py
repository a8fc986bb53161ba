"""The command `python -m transformer_bench`."""
from transformer_bench import main

main()
