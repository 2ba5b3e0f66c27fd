"""Pages and plots for people: of a run, of an evaluation, of a comparison. Each page is one self-contained file."""
