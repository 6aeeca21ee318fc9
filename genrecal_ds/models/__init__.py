"""Any Hugging Face VLM as (vision, projector, body, head); the Recalibrator; chats to tokens."""
