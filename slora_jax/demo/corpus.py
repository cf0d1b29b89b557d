"""Text for the tiny model's tokenizer and prompts, and questions for chat models."""

TEXT = """
A language model is trained once on a great deal of text and then adapted to many different tasks.
Low-rank adaptation, or LoRA, leaves the weights of the model as they are and learns a small update for some of them.
The update of a weight matrix is the product of two thin matrices, and the number of their rows is called the rank.
An adapter of rank eight is a thousand times smaller than the model that it changes.
That is why one company may own thousands of adapters: one for every customer, every language, every product.
Merging an adapter into the model makes it fast, but then the machine can serve only that one adapter.
Loading another copy of the model for every adapter would need more memory than any machine has.
A better server keeps one copy of the model and adds the small updates while it computes.
Requests for different adapters then share a batch, and the large matrices are read from memory only once.
Continuous batching lets a new request join as soon as another one leaves, without waiting for the whole batch.
Every token that was read or written leaves a key and a value in each layer, and later tokens look back at them.
This cache grows with every step, and nobody knows in advance how long an answer will become.
Paged attention therefore cuts the cache into pages of equal size, as an operating system cuts its memory.
Unified paging goes one step further and puts the weights of the adapters into the same pages.
When many users write long questions, most pages hold keys and values; when they ask for many adapters, weights do.
No page is reserved for one purpose, and because all pages are alike nothing is lost to fragmentation.
An adapter that nobody uses at the moment stays where it is until its pages are wanted for something else.
If it is asked for again before that happens, it need not be copied from the host a second time.
If memory runs out in the middle of an answer, the youngest request steps back and is computed again later.
Its tokens do not change by this, because the same computation gives the same result.
A scheduler decides which request is next: perhaps the first to arrive, or the one whose adapter is already there.
Early abort gives up on requests that would come too late anyway, so that the others are answered on time.
Fair scheduling counts the tokens of every user and gives the next turn to the one who has received the least.
Prompts are read in chunks, so that a long document does not hold up the answers that are being written.
Adapters have different ranks, and a fast kernel does not pad the small ones to the size of the largest.
It gathers the rows of each adapter from wherever they lie and multiplies them with the tokens that need them.
With tensor parallelism the model is divided among several devices, and the adapters are divided in the same way.
The additional communication is small, because the intermediate result has only as many columns as the rank.
Please write a short letter to the city council about the broken street lamp in front of the library.
Translate the following sentence into simple words that a child of seven years can understand.
What is the capital of the country in which the river Danube begins, and how far is it from the sea?
Summarize the report about the weather in the mountains during the first week of November.
Explain why the sky is blue, why the sunset is red, and why the clouds are white or grey.
Write a query that returns the names of all customers who bought more than three books last month.
List five questions that a doctor should ask a patient who complains about a headache.
The old ship left the harbour at midnight, and no one on board knew where the captain wanted to go.
Two farmers met at the market and talked about rain, potatoes, the price of milk and a lost dog.
In the evening the musicians played a slow waltz, while the guests walked through the garden under the lanterns.
A function that calls itself must come to an end, or else the computer will run out of memory.
The experiment was repeated twelve times with different samples, and the average error was below two percent.
Our customers expect a friendly answer within a few seconds, at any hour of the day and in their own language.
Dear team, thank you for the quick reply; the second version of the contract looks much better than the first.
Once upon a time there was a king who could not sleep because he kept counting the stars above his castle.
""".strip()

SENTENCES = tuple(TEXT.splitlines())

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How many legs does a spider have?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean on Earth?",
    "How do bees make honey?",
    "What is the opposite of cold?",
    "Which planet is closest to the sun?",
    "What do plants need to grow?",
    "Name three kinds of fruit.",
    "What is a bicycle?",
    "How does a refrigerator work?",
    "What is the boiling point of water?",
    "Why do leaves change colour in autumn?",
    "What is the longest river in Africa?",
    "Who painted the Mona Lisa?",
    "What does a librarian do?",
    "How many days are in a leap year?",
    "What is gravity?",
    "Tell me a fact about whales.",
    "What is the currency of Japan?",
    "How is bread made?",
    "What is a haiku?",
    "Which animal is the fastest on land?",
    "What is the square root of 81?",
    "Why do we sleep?",
    "What is a volcano?",
    "Give me a tip for learning a language.",
    "What is the tallest mountain in the world?",
    "How do airplanes fly?",
    "What are the primary colours?",
    "Write one sentence about the moon.",
    "What is the main ingredient of guacamole?",
    "Who was the first person on the moon?",
    "What is an alphabet?",
    "How do I boil an egg?",
    "What causes thunder?",
    "What is the smallest prime number?",
    "Suggest a name for a cat.",
    "What is a telescope used for?",
)
"""Short questions for chat models."""
