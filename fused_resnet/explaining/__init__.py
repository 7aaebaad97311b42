"""explain: the `calls` of a model, who computes them (`explain`), and how that is shown (`table`)."""
