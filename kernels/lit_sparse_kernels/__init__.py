"""Operations on blocks of weight matrices, each with a plain reference. Depends on torch and Triton only."""
