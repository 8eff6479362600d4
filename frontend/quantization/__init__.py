"""Read what a checkpoint says about its own quantisation, one file per format."""
