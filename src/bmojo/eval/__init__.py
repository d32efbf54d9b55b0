"""What a trained model is worth and costs: bits per byte, accuracy on tasks by distance, decoding time and state."""

from bmojo.eval.decode import decode_cost
from bmojo.eval.tasks import recall, score_task
from bmojo.eval.text import Documents, TextScore, TokenLists, by_position, score_documents

__all__ = [
    "Documents",
    "TextScore",
    "TokenLists",
    "by_position",
    "decode_cost",
    "recall",
    "score_documents",
    "score_task",
]
