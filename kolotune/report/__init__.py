"""The report, one HTML page about a run: facts.py gathers, charts.py plots, inline_svg.py embeds, page.py writes."""
