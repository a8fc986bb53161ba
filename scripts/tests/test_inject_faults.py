"""The faults of inject_faults.py fit the sources that they change."""
import unittest

import inject_faults


class InjectFaults(unittest.TestCase):
    def test_every_fault_changes_one_place(self):
        for framework, faults in inject_faults.FAULTS.items():
            text = inject_faults.source(framework).read_text()
            for name, _, old, _ in faults:
                with self.subTest(f"{framework}: {name}"):
                    self.assertEqual(text.count(old), 1, old)


if __name__ == "__main__":
    unittest.main()
