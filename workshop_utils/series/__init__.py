"""What a notebook starts with: the workshop, its settings form, plots, the report, and the runner
that executes the series."""
