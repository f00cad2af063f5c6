"""Base C: a tiny CLIP, a vision transformer trained on emoji next to frozen text embeddings."""
