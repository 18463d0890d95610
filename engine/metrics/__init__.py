"""How far a picture is from the reference. `engine.metrics.lpips_distance` is there for programs of other people."""


def __getattr__(name: str) -> object:
    if name == "lpips_distance":
        from engine.metrics.distances import lpips_distance  # brings torch, so not before it is asked for

        return lpips_distance
    raise AttributeError(f"engine.metrics has no {name}")
