"""The page and the API: Gradio on one side, the engine's requests, events and results on the other. No torch."""
