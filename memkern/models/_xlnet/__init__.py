"""What the two XLNet models share: the backbone, memory tokens, the segment loop, loading of every earlier layout."""
