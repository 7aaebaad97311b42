"""What this computer is: `devices` by name, `files` in the cache folder, memory (`malloc`), `onednn`, `cuda_graphs`."""
