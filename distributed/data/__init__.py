"""The Arrow engine: raw rows are prepared once into a store, then gathered from it batch by batch."""
