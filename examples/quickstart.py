"""Documents to answers in Python: make a corpus, build its index once, answer questions from it.

    python examples/quickstart.py [FOLDER] [--documents N] [--tokens N] [--questions N]

The model is the small one in the package; name a Hugging Face model instead to use your own.
"""

import argparse

import rabatch
from rabatch.demo.corpus import write_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--questions", type=int, default=4, help="questions about a document")
    options = parser.parse_args()

    corpus = write_corpus(
        f"{options.folder}/corpus",
        n_documents=options.documents,
        tokens=options.tokens,
        n_questions=options.questions,
    )

    # Once per document. Run this script again: nothing is prefilled a second time.
    store = f"{options.folder}/index"
    built = rabatch.build(corpus["paths"]["documents"], store=store, model="demo")
    print(
        f"built {built.built} documents, {built.skipped} were there already; {built.stored_bytes / 1e6:.1f} MB stored"
    )

    # As often as there are questions, here or on another machine.
    answered = rabatch.answer(
        corpus["paths"]["questions"],
        store=store,
        model="demo",
        recipe=rabatch.Recipe(method="graph", top_k=64),
    )
    for row in answered.rows:
        if row["status"] != "ok":
            print(f"{row['question_id']} failed: {row['reason']}")  # one bad row does not stop the others
            continue
        mark = "right" if row["answer"] == row["expected"] else f"expected {row['expected']}"
        print(f"{row['question']} {row['answer']} ({mark}; {row['attended_share']:.1%} of the keys attended)")
    return max(built.exit_code, answered.exit_code)


# Ray's workers import this module: what it does must not happen at import.
if __name__ == "__main__":
    raise SystemExit(main())
