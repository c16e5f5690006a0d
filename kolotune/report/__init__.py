"""One page about a run: facts.py gathers, figures.py draws, page.py writes it."""
