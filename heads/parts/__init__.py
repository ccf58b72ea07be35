"""Parts: what several heads are made of. A head may use any of them; none knows a head."""
