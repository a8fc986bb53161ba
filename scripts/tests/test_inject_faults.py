"""The faults of inject_faults.py fit the sources that they change."""
import unittest

import inject_faults


class InjectFaults(unittest.TestCase):
    def test_every_fault_changes_one_place(self):
        for framework in inject_faults.FAULTS:
            with self.subTest(framework):
                self.assertTrue(inject_faults.regions(framework))

    def test_names_are_unique(self):
        for framework, faults in inject_faults.FAULTS.items():
            names = [name for name, _, _ in faults]
            self.assertEqual(len(names), len(set(names)), framework)


if __name__ == "__main__":
    unittest.main()
