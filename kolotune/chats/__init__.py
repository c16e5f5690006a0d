"""Chats: read files (`reading`), render them (`templates`), encode them (`tokens`), build a data set (`dataset`)."""

from .chat import ROLES, Chat, Message

__all__ = ["ROLES", "Chat", "Message"]
