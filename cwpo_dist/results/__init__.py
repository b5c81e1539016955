"""What a run left, for people: figures, pages, samples, exported models."""
