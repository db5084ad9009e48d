"""Agents: one file each, all behind `ctrl_rl.agents.agent.Agent`."""
