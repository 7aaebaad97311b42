"""What this computer is: `devices` by name, memory (`malloc`), `onednn`, `cuda_graphs`.

And what everything leans on: `files` in the cache folder, `errors` in words, `locks` that survive a fork. `imports` are
waited for.
"""
