"""The command line (`main`), a module a verb; `console` is what they share."""
