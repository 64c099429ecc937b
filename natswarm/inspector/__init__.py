"""Inspect the NATs between here and the swarm: interfaces, gateway, path, and what peers see.

    report = await inspect(node, invites=[...])
    report.profile            # what the planner uses
    report.finding("mapping") # with its evidence
    report.as_json()          # the same for programs

| file | idea |
|---|---|
| report.py | what comes out, as types |
| run.py | who is asked when; nothing that fails takes the rest along |
| gateway.py | the gateway's services, and what lease they give |
| evidence.py | what the parts say together, what each property rests on, what to mind |
| advice.py | what it means for meeting peers |
| offers.py | the tests to choose from, and their cost |
| schema.py | the report for programs |
| changes.py | what is new since the last one |
| signed.py | a profile to hand over |
"""

from natswarm.inspector.changes import changes
from natswarm.inspector.evidence import is_known
from natswarm.inspector.offers import FULL, QUICK, QUICK_LIMIT_S, Offer, all_offers, find_test
from natswarm.inspector.report import (
    Evidence,
    Finding,
    GatewayFindings,
    InspectionReport,
    LocalTest,
    ObserverReport,
    Outcome,
    Part,
    Prospect,
    ServiceFindings,
    State,
    Test,
)
from natswarm.inspector.run import ProgressCallback, Surroundings, inspect
from natswarm.inspector.signed import SignedProfile, open_signed_profile_untrusted

__all__ = [
    "FULL",
    "QUICK",
    "QUICK_LIMIT_S",
    "Evidence",
    "Finding",
    "GatewayFindings",
    "InspectionReport",
    "LocalTest",
    "ObserverReport",
    "Offer",
    "Outcome",
    "Part",
    "ProgressCallback",
    "Prospect",
    "ServiceFindings",
    "SignedProfile",
    "State",
    "Surroundings",
    "Test",
    "all_offers",
    "changes",
    "find_test",
    "inspect",
    "is_known",
    "open_signed_profile_untrusted",
]
