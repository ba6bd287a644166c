"""Questions of many kinds."""

PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "def fibonacci(n):",
    "List five uses of a paper clip.",
    "Translate 'good morning' into Spanish, German and Italian.",
    "Why is the sky blue?",
    "What is 17 times 23? Show each step.",
    "Summarize the plot of Romeo and Juliet.",
    "Give me a recipe for pancakes.",
    "Who wrote the Iliad, and when?",
    "Write a haiku about rain.",
    "What are the planets of the solar system?",
    "How do vaccines work?",
    "Write a Python function that reverses a string.",
    "Name three differences between cats and dogs.",
    "What would you pack for a week in the mountains?",
    "Describe the water cycle to a child.",
    "Continue: Once upon a time there was a small robot who",
    "What is the meaning of the word 'serendipity'?",
)
