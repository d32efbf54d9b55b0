"""What a trained model is worth and costs: bits per byte, recall by distance, decoding time and state."""

from bmojo.eval.decode import decode_cost
from bmojo.eval.recall import recall
from bmojo.eval.text import Documents, TextScore, TokenLists, by_position, score_documents

__all__ = ["Documents", "TextScore", "TokenLists", "by_position", "decode_cost", "recall", "score_documents"]
