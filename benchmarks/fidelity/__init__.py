"""The cycle model against published measurements of the card; see docs/fidelity.md."""
