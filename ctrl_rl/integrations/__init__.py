"""Other libraries' agents: trained on the control env, and given their certified gap.

Import from the modules: `ctrl_rl.integrations.evaluation`, and `ctrl_rl.integrations.sb3`, which
needs stable-baselines3.
"""
