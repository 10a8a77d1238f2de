"""Model families as people have them, small and random: what tests and ``tools/bench/families.py`` try extraction on."""
