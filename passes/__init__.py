"""Graph to facts and graph to graph: torch.fx only, no data, no training."""
