"""freeze: a model as a plan for each input shape.

- `freeze`: the verb, and what it refuses; `frozen`: what it returns; `parts`: what can be frozen of other models
- `trace`: the graph, its `respelling`, and whose `memory` it reads and writes
- `state`: what a forward keeps; `copies` of models
- `make`: the passes over a `draft`; `lowering`, `biases`, `placing` and `layouts`: the passes; `dtypes` of all values,
  with `shapes` that need not be asked of torch
- `plan`: what runs; `modules`: what it is made of; `warm`: its first run, and its capture on a GPU,
  in which `swapping` tries the second best
"""
