"""Feature extraction: from videos or cached features to the cells of a store."""
